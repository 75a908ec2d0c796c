"""Speed against torch: a correctness gate first, then interleaved timings, raw JSON, and tables made from it alone."""
