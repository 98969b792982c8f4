"""The pages for people: queue, batches, submitting, models, machine, keys.

Server-rendered by Jinja2 with autoescape, kept live by one stream of events a page. Everything that
a page shows or changes goes through the same store methods as the API, for the same caller.
"""
