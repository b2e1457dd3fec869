"""Merges of N models at once, tensor by tensor. One small module a method; `contract` says what they share."""
