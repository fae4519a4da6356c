"""An artifact behind the HTTP endpoints of OpenAI's API, without torch and without transformers."""
