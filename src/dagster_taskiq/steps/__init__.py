"""The steps of one run, as its own process sees them: send them, follow them in the log, stop them. No asyncio."""
