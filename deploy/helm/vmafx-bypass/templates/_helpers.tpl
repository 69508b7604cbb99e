{{- define "vmafx-bypass.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "vmafx-bypass.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "vmafx-bypass.name" . }}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- $full | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "vmafx-bypass.selectorLabels" -}}
app.kubernetes.io/name: {{ include "vmafx-bypass.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vmafx-bypass.labels" -}}
{{ include "vmafx-bypass.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "vmafx-bypass.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "vmafx-bypass.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "vmafx-bypass.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- /* What `run` is started with; a mistake that the schema cannot see ends the rendering. */}}
{{- define "vmafx-bypass.args" -}}
{{- $run := .Values.ebpfBypass }}
{{- range $run.prefixes }}
{{- if not (hasPrefix (printf "%s/" $run.mountRoot) .) }}
{{- fail (printf "ebpfBypass.prefixes: `%s` is not below ebpfBypass.mountRoot `%s`" . $run.mountRoot) }}
{{- end }}
{{- end }}
- run
{{- range $run.prefixes }}
- --prefix={{ . }}
{{- end }}
{{- /* The pod may come before the node's rclone. */}}
- --wait
- --attach={{ $run.attach }}
- --pin-dir={{ $run.pinDir }}
{{- with $run.maxFds }}
- --max-fds={{ int64 . }}
{{- end }}
{{- with $run.cacheDir }}
- --cache-dir={{ . }}
{{- end }}
{{- if $run.account }}
- --account
{{- end }}
{{- if eq $run.log "notes" }}
- --no-events
{{- else }}
- --format={{ $run.log }}
{{- end }}
{{- with $run.socket }}
{{- if .enabled }}
- --socket={{ .hostPath }}/{{ .name }}
- --socket-mode={{ .mode }}
{{- if kindIs "invalid" .group | not }}
- --socket-owner=:{{ int64 .group }}
{{- end }}
- --copy-budget={{ .copyBudget }}
{{- end }}
{{- end }}
{{- if $run.metrics.enabled }}
- --metrics={{ $run.metrics.address }}:{{ $run.metrics.port }}
{{- end }}
{{- end }}

{{- define "vmafx-bypass.capabilities" -}}
- BPF
- PERFMON
- DAC_READ_SEARCH
- SYS_PTRACE
{{- with .Values.ebpfBypass.socket }}
{{- if and .enabled .privilegedClients }}
- SYS_ADMIN
- SYS_CHROOT
{{- end }}
{{- end }}
{{- end }}
