"""A fleet of simulated nodes against a real control plane: workspaces come and go, nodes die, and an audit watches."""
