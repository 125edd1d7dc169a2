"""What commands share: errors and exit codes, help, options of a connection, types of values, tables and JSON."""
