"""The HTTP server: hands out lines, takes results. See PROTOCOL.md."""
