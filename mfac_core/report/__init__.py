"""Numbers, tables and pictures of finished runs."""
