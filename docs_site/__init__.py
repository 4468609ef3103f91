"""The documentation site: `make docs` collects pages, generates the reference from the code, and checks links."""
