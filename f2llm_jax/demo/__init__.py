"""The embedded demo: bundled text in fourteen languages and some code, and a tiny model to try them with."""
