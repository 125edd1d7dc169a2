"""The gRPC side: convert, delegate to the engine, convert back. The only package that knows the wire."""
