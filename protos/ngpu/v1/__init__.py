"""Generated from the `.proto` files beside it by `scripts/protos`. Do not edit."""
