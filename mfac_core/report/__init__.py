"""Numbers, tables and figures of finished runs."""
