"""Questions about long documents, so that their answers lie far away (arXiv 2508.14444, section 2.6).

Documents are cut into chunks, a share of the chunks is sampled, a writer asks a question about each, and all questions
with their answers are appended at the end of the document.
"""
