"""Encryption at rest: `store` wraps another store, `sealer` encrypts records, `keyring` has the keys, `xaes` the cipher."""
