"""A model file and questions in, events out: what joins prompt, planning and engine."""
