"""The real scheduler and allocator on a virtual clock, fed by a trace of requests."""
