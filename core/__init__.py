"""What both sides share: formats, digests, signatures, durable files, the error tree and the plain nouns."""
