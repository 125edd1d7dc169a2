"""The HTTP door: JSON over HTTP for every unary call, by the paths of the protocol's `google.api.http` options."""
