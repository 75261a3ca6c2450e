"""Flow matching, guidance and sampling."""
