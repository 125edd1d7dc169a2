"""Who calls: finds callers by what their calls show, a token, a certificate or a JWT, as files of the operator say."""
