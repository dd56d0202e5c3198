"""The decisions: pure, without I/O, clock or asyncio. Time is always an argument."""
