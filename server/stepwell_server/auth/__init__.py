"""Authentication of callers and their quotas, from the operator's files.

A call is authenticated by a token, a certificate or a JWT. This package reads the files and uses the rules of `core`; it
knows nothing of gRPC.
"""
