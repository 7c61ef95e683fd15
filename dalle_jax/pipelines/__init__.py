"""What people do with trained stages: pictures and prompts in, pictures with provenance out."""
