"""What the doctor looks at, one idea a file. A check reads, judges, and names a fix; it changes nothing."""
