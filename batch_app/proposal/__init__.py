"""Propose a registry entry for a model, from its small files, before any weights are downloaded."""
