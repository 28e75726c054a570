"""The part of Millrace that serves: an OpenAI-compatible router over ready endpoints."""
