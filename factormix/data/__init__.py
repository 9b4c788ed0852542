"""Text and labelled data: files to documents, documents to windows of tokens."""
