# One image for every target. The base brings torch's libraries or none of them:
#   docker build -t evenstep .                                            (NVIDIA, a CUDA runtime)
#   docker build -t evenstep --build-arg BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm \
#       --build-arg PIP_INDEX=https://download.pytorch.org/whl/cpu .      (CPU)
# The base needs Python 3.11 or newer with venv, as python3.
ARG BASE_IMAGE=docker.io/pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

# Wheels are installed from here, where pip and whatever it needs may stay behind: a secret named
# pip is its configuration, for those behind an index of their own.
FROM ${BASE_IMAGE} AS packages
ARG PIP_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The base's own torch is taken where it has one.
RUN python3 -m venv --system-site-packages --without-pip /opt/evenstep && python3 -m venv /opt/pip
WORKDIR /source
# What the source needs, without the source: a layer that a change of the source leaves alone.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    /opt/pip/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['metrics'], sep='\n')" > requirements.txt \
    && /opt/pip/bin/pip --python /opt/evenstep/bin/python install --quiet --constraint constraints.txt \
        ${PIP_INDEX:+--extra-index-url "${PIP_INDEX}"} --requirement requirements.txt

FROM packages AS source
COPY README.md ./
COPY service service
COPY launch launch
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    /opt/pip/bin/pip --python /opt/evenstep/bin/python install --quiet --no-deps --prefix /opt/source .

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="evenstep" \
      org.opencontainers.image.description="One training job, the same run on one device or on many." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
COPY --from=packages /opt/evenstep /opt/evenstep
# A layer of its own, so that a new version is a megabyte to push and not all of torch.
COPY --from=source /opt/source /opt/evenstep
# A name for the uid that the manifests set, for what asks who it is. Nothing runs as root.
RUN printf 'evenstep:x:10001:10001::/tmp:/usr/sbin/nologin\n' >> /etc/passwd \
    && printf 'evenstep:x:10001:\n' >> /etc/group
# HOME is the one place that can be written to where the root is read-only.
ENV PATH=/opt/evenstep/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
# In exec form: the launcher is process 1 and gets the signal itself.
ENTRYPOINT ["evenstep"]
CMD ["--help"]
