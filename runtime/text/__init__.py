"""Tokens and text: tokenizers, detokenizing, chat templates, and the texts of roles and tool calls."""
