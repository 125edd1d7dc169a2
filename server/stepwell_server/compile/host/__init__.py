"""The processes that compile: a fork server, its workers, their sandbox and limits."""
