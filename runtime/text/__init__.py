"""Tokens and text: tokenizers, detokenizing, chat templates, what roles and tool calls write."""
