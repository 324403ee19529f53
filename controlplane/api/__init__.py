"""The services of `ngpu.v1`: translate, call, translate back. Only here do grpc and protobuf meet the control plane."""
