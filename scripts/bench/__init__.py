"""What a stored and delivered event costs: latency, CPU and memory, beside the provider itself and a plain relay."""
