"""The wire contract: messages and services in `ngpu.v1`; in `ngpu.wire`, what both ends must agree on besides."""
