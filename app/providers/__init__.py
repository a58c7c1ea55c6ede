"""AI providers: one contract, one transport, one module per wire dialect."""
