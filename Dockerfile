# The workstation: trains, quantises, exports, predicts. For the device see jetson/Dockerfile.jp6 and jetson/Dockerfile.jp7.
#
#   docker build --tag fmdeploy .
#   docker run --rm --gpus all --shm-size 1g --user "$(id -u):$(id -g)" --volume "$PWD/out:/out" fmdeploy demo --out /out/demo
#
# BASE needs Python 3.11 with venv. The CUDA libraries come with torch; the host gives the driver.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
COPY pyproject.toml setup.py constraints.txt README.md LICENSE /source/
COPY src /source/src
COPY teacher /source/teacher
COPY distill /source/distill
COPY quantize /source/quantize
COPY export /source/export
COPY runtime /source/runtime
COPY jetson /source/jetson
RUN python3 -m venv /opt/fmdeploy \
 && /opt/fmdeploy/bin/python -m pip install --no-cache-dir --constraint /source/constraints.txt \
    '/source[train,export,sim,report,serve,sign]'

FROM ${BASE}
COPY --from=build /opt/fmdeploy /opt/fmdeploy
# HOME is where torch and matplotlib keep caches; any user may write there.
ENV PATH=/opt/fmdeploy/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["fmdeploy"]
CMD ["--help"]
