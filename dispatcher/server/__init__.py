"""The HTTP server: hands out lines, takes results. See docs/protocol.md."""
