"""The contract of Millrace: generated protobuf messages and gRPC stubs."""
