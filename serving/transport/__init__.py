"""How requests come in and answers go out: HTTP, gRPC, JSON, protobuf, limits."""
