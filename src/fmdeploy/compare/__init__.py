"""Is a candidate as good as what is deployed: in every domain, every slice, and on the cases that nobody may lose?"""
