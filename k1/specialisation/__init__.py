"""Who is responsible for what: specialists among the agents, and what became of a text."""
