"""One small runner per compared system; each is started in its own process by its own interpreter."""
