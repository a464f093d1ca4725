"""The server: KServe v2 over HTTP around one runtime, on loopback or a Unix socket.

    address      sockets that are free, private and ours
    connection   limits of one HTTP connection: headers, time, number
    body         request bodies, bounded before and after decompression
    request      bytes → one frame         reply      one frame → bytes
    line         the bounded queue         model      one thread that owns one runtime
    service      an embedded runtime that kicks systemd's watchdog
    station      which model serves; loading, reloading, checking the disk
    board        heat and current of a Jetson, told to the model that serves
    app          the URLs                  metrics    Prometheus
    process      sockets, signals, READY line, draining
    serve        the verb
"""
