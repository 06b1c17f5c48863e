"""The resumable job behind ``ditfast sample``: request, plan, batches, files."""
