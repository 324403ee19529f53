"""The wire contract: generated messages and services in `ngpu.v1`, and `ngpu.wire`, what both ends must agree on besides."""
