"""Tokens and text: tokenizers, detokenizing, chat templates."""
