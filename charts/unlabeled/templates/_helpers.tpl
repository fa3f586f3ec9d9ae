{{- define "unlabeled.name" -}}
{{- if contains "unlabeled" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-unlabeled" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "unlabeled.selector" -}}
app.kubernetes.io/name: unlabeled
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "unlabeled.labels" -}}
{{ include "unlabeled.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "unlabeled.image" -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag }}
{{- end -}}
{{- end }}

{{- define "unlabeled.ownImage" -}}
{{ include "unlabeled.image" (merge (dict "tag" (.Values.image.tag | default .Chart.AppVersion)) .Values.image) }}
{{- end }}

{{- define "unlabeled.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "unlabeled.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "unlabeled.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Everything that goes to disk goes to volumes of bounded size. */}}
{{- define "unlabeled.tmp" -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
{{- end }}

{{/* A toleration of the GPUs' taint, when there are any, and the given ones. */}}
{{- define "unlabeled.tolerations" -}}
{{- if or .tolerations .gpus }}
tolerations:
  {{- if .gpus }}
  - key: nvidia.com/gpu
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with .tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "unlabeled.resources" -}}
requests:
  {{- toYaml .resources.requests | nindent 2 }}
limits:
  {{- toYaml .resources.limits | nindent 2 }}
  {{- if .gpus }}
  nvidia.com/gpu: {{ .gpus }}
  {{- end }}
{{- end }}

{{/* "true" where the registry, or one part of it, is a folder, that is on the claim. */}}
{{- define "unlabeled.folder" -}}
{{- if or (hasPrefix "/" .Values.registry.git) (hasPrefix "/" .Values.registry.remote) }}true{{ end -}}
{{- end }}

{{/* "true" where the registry, or one part of it, is a URL. */}}
{{- define "unlabeled.url" -}}
{{- if not (and (hasPrefix "/" .Values.registry.git) (hasPrefix "/" .Values.registry.remote)) }}true{{ end -}}
{{- end }}

{{- define "unlabeled.dns" -}}
- {port: 53, protocol: UDP}
- {port: 53, protocol: TCP}
{{- end }}

{{/* "true" where what is served comes from the registry: a run, or what is promoted. */}}
{{- define "unlabeled.recorded" -}}
{{- if or .Values.serving.run .Values.serving.follow.enabled }}true{{ end -}}
{{- end }}

{{/* The folder of the model repository in Triton's pod. */}}
{{- define "unlabeled.repository" -}}
{{- if include "unlabeled.recorded" . -}}
/models/repository
{{- else -}}
/models{{ with .Values.serving.claimPath }}/{{ . }}{{ end }}
{{- end -}}
{{- end }}

{{/* "true" where the sidecars load and unload models. */}}
{{- define "unlabeled.explicit" -}}
{{- if or .Values.serving.follow.enabled .Values.serving.canary.enabled }}true{{ end -}}
{{- end }}

{{/* The word that Triton asks of those who load and unload models. */}}
{{- define "unlabeled.controlKey" -}}
- name: TRITON_CONTROL_KEY
  valueFrom:
    secretKeyRef: {name: {{ .Values.serving.controlSecret }}, key: key}
{{- end }}

{{/* "true" where there is Prometheus' operator, or the reader says so. */}}
{{- define "unlabeled.prometheus" -}}
{{- if or (eq .Values.monitoring.crds "assume") (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") }}true{{ end -}}
{{- end }}

{{- define "unlabeled.scheduleNamespace" -}}
{{ .Values.schedule.namespace | default .Release.Namespace }}
{{- end }}

{{/* Where a recurring run is made, and where it records. */}}
{{- define "unlabeled.scheduleWhere" -}}
- --host={{ .Values.schedule.host }}
- --namespace={{ include "unlabeled.scheduleNamespace" . }}
- --experiment={{ .Values.schedule.experiment }}
- --profile={{ .Values.schedule.profile }}
- --registry={{ .Values.registry.git }}
- --remote={{ .Values.registry.remote }}
- --workspace=/tmp/workspace
{{- with .Values.schedule.secret }}
- --secret={{ . }}
{{- end }}
{{- end }}

{{/* A container that makes a recurring run, without its name and arguments. */}}
{{- define "unlabeled.scheduleContainer" -}}
image: {{ include "unlabeled.ownImage" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [unlabeled, schedule]
env:
  # The steps run in the image that made the schedule.
  - name: UNLABELED_IMAGE
    value: {{ include "unlabeled.ownImage" . }}
  - name: HOME
    value: /tmp
securityContext:
  {{- include "unlabeled.containerSecurity" . | nindent 2 }}
resources:
  {{- toYaml .Values.schedule.resources | nindent 2 }}
volumeMounts:
  - name: token
    mountPath: /var/run/secrets/kubeflow/pipelines
    readOnly: true
  - name: tmp
    mountPath: /tmp
{{- end }}

{{- define "unlabeled.trainerNamespace" -}}
{{ .Values.trainer.namespace | default (include "unlabeled.scheduleNamespace" .) }}
{{- end }}
