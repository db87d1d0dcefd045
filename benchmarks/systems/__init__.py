"""One small runner per compared system; each is started in its own process and interpreter."""
