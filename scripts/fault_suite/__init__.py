"""The fault suite: real processes, real faults, callers who write down what they were told, and the audit at the end.

`rig` is a platform to be hurt, `faults` the ways to hurt it, `audit` what compares three accounts of one run: that of
the callers, the database's, and the containers' own. tests/faults and scripts/faults are built of these.
"""
