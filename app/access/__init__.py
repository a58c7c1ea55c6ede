"""Who asks: API keys, the principal of a request, and what each route needs of it."""
