"""``/v1/responses``: its request, its answer, and the last responses, kept in memory."""
