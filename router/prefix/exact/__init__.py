"""The exact prefix index: engines' own words on what they have cached, and prompts in engines' own tokens."""
